"""Reading adapter files: safetensors only, fail closed."""
