"""The proof: PEFT's configurations × base architectures, each row of a mixed batch against PEFT alone."""
