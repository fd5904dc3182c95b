"""One file per op: the formula, the allocator, schema + implementation + fake, autograd, the public function."""
