BACKEND: list[tuple[str, ...]] = []
