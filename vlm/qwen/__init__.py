"""Our own Qwen (the first: 1.8B to 72B) and Qwen-VL, `QWenLMHeadModel`, with the official parameter names.

Importing this package imports neither torch nor transformers; the module that needs them is imported by name.
"""
