package org.mobilemm

/** What went wrong, in one line for the person who uses the app: what, where, and what to do. */
open class MobileMMError(message: String, cause: Throwable? = null) : Exception(message, cause)

/** A stranger's value as part of a one-line message: short, and nothing in it that moves a terminal or hides text. */
fun shown(value: Any?, most: Int = 60): String {
    val text =
        when (value) {
            null -> "null"
            is Map<*, *> -> "an object"
            is List<*> -> "an array"
            is String -> quoted(value.take(most + 1))
            else -> value.toString()
        }
    return if (text.length <= most) text else text.take(most) + "…"
}

private fun quoted(text: String): String =
    buildString {
        append('\'')
        for (char in text) {
            when {
                char == '\'' || char == '\\' -> append('\\').append(char)
                char == '\n' -> append("\\n")
                char in ' '..'~' -> append(char)
                else -> append("\\u").append(char.code.toString(16).padStart(4, '0'))
            }
        }
        append('\'')
    }

/** Somebody else's message in one line of at most 200 characters. */
fun oneLine(error: Throwable): String =
    (error.message ?: error.javaClass.simpleName).split(Regex("\\s+")).joinToString(" ").trim().take(200)
