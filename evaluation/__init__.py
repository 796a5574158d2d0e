"""Honest evaluation: answers with the real pictures, blind and with other ones, metrics, intervals, reports."""
