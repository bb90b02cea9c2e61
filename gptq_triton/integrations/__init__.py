"""Where people work: transformers, PEFT and others. Nothing here is imported by the package itself."""
