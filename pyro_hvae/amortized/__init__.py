"""Guides made from models."""
