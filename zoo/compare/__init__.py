"""Runs, leaderboards and reports: reads run directories only, never models. Imports no torch."""
