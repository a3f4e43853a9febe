"""Findings from runs: tables, comparisons, power laws, plans and reports. Reads MLflow; trains nothing."""
