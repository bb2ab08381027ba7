"""A diagnosis or a plan for people: terminal, Markdown, and one page with a picture."""
