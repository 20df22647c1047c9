"""What some methods are beside a reducer: one interface per file, asked for by `isinstance`."""
