"""The contract between the CRD, the operator, the trainer and the CLI: models, constants and URI rules.

Imports pydantic and PyYAML only, so that every part of the product can import it for free.
"""
