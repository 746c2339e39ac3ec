"""The proof: PEFT's configurations times base architectures, each row of a mixed batch against PEFT alone."""
