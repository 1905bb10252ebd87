"""Servers, sessions and scripted peers that several tests share."""
