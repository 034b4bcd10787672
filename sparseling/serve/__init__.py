"""The server: the OpenAI API on the native engine, with reasoning, tools, grammars, and the routing of every token."""
