"""Other libraries' parameter names and layouts, mapped to ours and back."""
