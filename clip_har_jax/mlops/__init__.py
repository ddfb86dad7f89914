"""Operations around a model: trackers, registry, hub; each third-party service in one file."""
