"""API objects as the core reads them."""
