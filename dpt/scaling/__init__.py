"""What the runs say: tables, comparisons, power laws, plans and reports. Reads MLflow; trains nothing."""
