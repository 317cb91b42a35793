"""Networks: pure Linen modules that know nothing of files, flags or devices."""
