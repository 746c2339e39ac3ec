"""Several adapters -> one: PEFT's ways of merging, checked beforehand and measured afterwards."""
