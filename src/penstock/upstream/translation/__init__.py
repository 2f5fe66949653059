"""Between OpenAI's bodies and those of providers that have a form of their own. Pure.

    chat.read, responses.read     OpenAI's body ──► base.Request
    anthropic, gemini, mistral,
    bedrock                       base.Request ──► the provider's body
                                  the provider's answer ──► base.Answer
    answers.write                 base.Answer ──► OpenAI's body, as the endpoint gives it

Each provider is a module with the two functions of `base.Translation`. What has no counterpart
is an `Untranslatable` that names the field: nothing that changes the answer is left out. The
tables of `docs/translation.md` say what becomes of every field.
"""
