"""Our own InternLM-XComposer, the first (VL-7B and 7B), with the official parameter names, on today's transformers.

Importing this package imports neither torch nor transformers; the module that needs them is imported by name.
"""
