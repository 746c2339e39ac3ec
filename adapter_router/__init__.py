"""adapter-router: thousands of PEFT LoRA adapters on shared base models, each served exactly as if alone."""
