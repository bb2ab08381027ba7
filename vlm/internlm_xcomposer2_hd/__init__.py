"""Our own InternLM-XComposer2-4KHD and -2.5: XComposer2 for images cut into tiles, with the official parameter names.

Importing this package imports neither torch nor transformers; the module that needs them is imported by name.
"""
