"""Rewards over HTTP: what is said (`wire`), who serves it (`service`), who asks (`remote`), and judges."""
