"""A model in one GGUF file, as llama.cpp, Ollama and others read it."""
