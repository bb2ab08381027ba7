"""Our own GLM-4-9B and GLM-4V-9B (`ChatGLMModel`), with the official parameter names, on today's transformers.

Importing this package imports neither torch nor transformers; the module that needs them is imported by name.
"""
