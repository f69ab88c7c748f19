"""The HoRA method as a specification: shapes, initialisation, reference, files and the conformance kit."""
