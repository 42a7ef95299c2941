"""What every room uses and no user imports: borrowing a model, files, digests, plain values."""
