"""One file per PEFT method: its configuration fields, its tensors' names and shapes, and its formula."""
