"""Files of tensors, whole or in part."""
