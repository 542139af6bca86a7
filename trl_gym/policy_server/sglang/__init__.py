"""SGLang's server behind the gateway: what it is asked and answers, in vLLM's form."""
