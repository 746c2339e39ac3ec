"""A PEFT adapter directory -> exact tensors, or every reason why not."""
