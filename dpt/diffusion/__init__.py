"""The forward process, its training objective, samplers, and seeded noise. Knows neither networks nor data."""
