"""Steps that must not count, data that is left out, replicas that drift: what keeps a long run from going wrong."""
