"""A Redis Cluster: nodes, slots, and a link and a subscriber over all of them."""
