"""Results as Markdown, HTML and figures."""
