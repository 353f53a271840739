"""What ``cluster-fl sweep`` is made of; only :mod:`tuning` and :mod:`trial` import Ray."""
