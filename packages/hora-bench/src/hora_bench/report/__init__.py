"""The pages: tables, plots and verdicts from result files alone."""
