"""Benchmarks; installed as vtok.bench for `vtok bench`. One bench_<op>.py per op, found by name."""
