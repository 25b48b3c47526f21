"""One file per backend; none imports a heavy library before it computes."""
