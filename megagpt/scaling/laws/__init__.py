"""Scaling-law studies: a ladder of model sizes and budgets, what its runs reached, the law they follow, its report."""
