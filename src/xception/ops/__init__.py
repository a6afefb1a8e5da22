"""The operations of the networks: `reference` says what each one is.

Nothing is imported here, so that `backend`, which is free of torch, stays so.
"""
