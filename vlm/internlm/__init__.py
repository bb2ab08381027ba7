"""Our own InternLM, the first (7B and 20B): transformers' Llama under the official keys and names.

Importing this package imports neither torch nor transformers; the module that needs them is imported by name.
"""
