"""Real Redis servers, fault proxies, server processes and browsers, for tests and scripts."""
