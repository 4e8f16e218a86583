"""A policy as a file for another runtime, checked in that runtime before it is kept: server, browser, phone, edge."""
