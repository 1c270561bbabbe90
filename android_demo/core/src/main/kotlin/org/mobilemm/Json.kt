package org.mobilemm

import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

/**
 * JSON as strangers send it, read strictly: UTF-8, no key twice, no NaN, no half surrogates, not nested too deep.
 *
 * Values are Map, List, String, Boolean, null, Long for whole numbers, [HugeNumber] for those that do not fit one,
 * and Double.
 */
object Json {
    const val DEEPEST = 64

    /** A whole number of more than 64 bits; no key of ours takes one. */
    data class HugeNumber(val digits: String) {
        override fun toString() = "a number of ${digits.length} digits"
    }

    /** Raises [JsonError] for whatever is not JSON in this sense. */
    fun parse(data: ByteArray): Any? {
        val decoder =
            Charsets.UTF_8.newDecoder()
                .onMalformedInput(CodingErrorAction.REPORT)
                .onUnmappableCharacter(CodingErrorAction.REPORT)
        val text =
            try {
                decoder.decode(ByteBuffer.wrap(data)).toString()
            } catch (error: CharacterCodingException) {
                throw JsonError("is not UTF-8", error)
            }
        if (text.startsWith('\uFEFF')) throw JsonError("begins with a byte order mark; it must be plain UTF-8")
        return Parser(text).whole()
    }

    /** The same value as text, numbers as Kotlin writes them. `indent` 0 writes one line. */
    fun write(value: Any?, indent: Int = 0): String = StringBuilder().also { Writer(it, indent).write(value, 0) }.toString()
}

/** What is wrong with a JSON text, as the end of a sentence about its file. */
class JsonError(message: String, cause: Throwable? = null) : Exception(message, cause)

private class Parser(private val text: String) {
    private var at = 0

    fun whole(): Any? {
        val value = value(0)
        space()
        if (at < text.length) fail("something follows its end")
        return value
    }

    private fun fail(what: String): Nothing = throw JsonError("is not valid JSON ($what, character $at)")

    private fun space() {
        while (at < text.length && (text[at] == ' ' || text[at] == '\n' || text[at] == '\t' || text[at] == '\r')) at++
    }

    private fun value(depth: Int): Any? {
        space()
        if (at >= text.length) fail("it ends early")
        return when (val char = text[at]) {
            '{' -> nested(depth) { members(it) }
            '[' -> nested(depth) { elements(it) }
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            else -> if (char == '-' || char in '0'..'9') number() else fail("a value is expected")
        }
    }

    private inline fun <T> nested(
        depth: Int,
        read: (Int) -> T,
    ): T {
        if (depth >= Json.DEEPEST) fail("nested deeper than ${Json.DEEPEST} levels")
        at++
        return read(depth + 1)
    }

    private fun <T> word(
        word: String,
        value: T,
    ): T {
        if (!text.startsWith(word, at)) fail("a value is expected")
        at += word.length
        return value
    }

    private fun members(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        space()
        if (take('}')) return found
        while (true) {
            space()
            if (at >= text.length || text[at] != '"') fail("a key is expected")
            val key = string()
            space()
            if (!take(':')) fail("a colon is expected")
            val value = value(depth)
            if (found.containsKey(key)) fail("key ${shown(key)} stands there twice")
            found[key] = value
            space()
            if (take('}')) return found
            if (!take(',')) fail("a comma is expected")
        }
    }

    private fun elements(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        space()
        if (take(']')) return found
        while (true) {
            found += value(depth)
            space()
            if (take(']')) return found
            if (!take(',')) fail("a comma is expected")
        }
    }

    private fun take(char: Char): Boolean {
        if (at >= text.length || text[at] != char) return false
        at++
        return true
    }

    private fun string(): String {
        at++
        val start = at
        while (at < text.length && text[at] != '"' && text[at] != '\\' && text[at] >= ' ') at++
        if (at < text.length && text[at] == '"') return checked(text.substring(start, at++))
        val found = StringBuilder(text.substring(start, at))
        while (true) {
            if (at >= text.length) fail("a string does not end")
            val char = text[at++]
            when {
                char == '"' -> return checked(found.toString())
                char == '\\' -> found.append(escaped())
                char < ' ' -> fail("a control character in a string")
                else -> found.append(char)
            }
        }
    }

    private fun escaped(): Char {
        if (at >= text.length) fail("a string does not end")
        return when (val char = text[at++]) {
            '"', '\\', '/' -> char
            'b' -> '\b'
            'f' -> '\u000C'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> {
                val digits = text.substring(at, minOf(at + 4, text.length))
                if (digits.length < 4 || !digits.all { it in '0'..'9' || it in 'a'..'f' || it in 'A'..'F' }) {
                    fail("\\u without four digits")
                }
                at += 4
                digits.toInt(16).toChar()
            }
            else -> fail("an unknown escape")
        }
    }

    private fun checked(string: String): String {
        var index = 0
        while (index < string.length) {
            val char = string[index]
            if (char.isSurrogate()) {
                val whole = char.isHighSurrogate() && index + 1 < string.length && string[index + 1].isLowSurrogate()
                if (!whole) fail("half a surrogate pair in a string")
                index++
            }
            index++
        }
        return string
    }

    private fun number(): Any {
        val start = at
        take('-')
        digits(leadingZero = false)
        var whole = true
        if (take('.')) {
            whole = false
            digits(leadingZero = true)
        }
        if (at < text.length && (text[at] == 'e' || text[at] == 'E')) {
            whole = false
            at++
            if (!take('+')) take('-')
            digits(leadingZero = true)
        }
        val found = text.substring(start, at)
        if (whole) return found.toLongOrNull() ?: Json.HugeNumber(found)
        val number = found.toDouble()
        if (number.isInfinite()) fail("${shown(found)} is no finite number")
        return number
    }

    private fun digits(leadingZero: Boolean) {
        val start = at
        while (at < text.length && text[at] in '0'..'9') at++
        if (at == start) fail("a digit is expected")
        if (!leadingZero && text[start] == '0' && at > start + 1) fail("a number begins with 0")
    }
}

private class Writer(private val out: StringBuilder, private val indent: Int) {
    fun write(
        value: Any?,
        depth: Int,
    ) {
        when (value) {
            is Map<*, *> -> list('{', '}', value.entries, depth) { (key, inner) ->
                string(key as String)
                out.append(": ")
                write(inner, depth + 1)
            }
            is List<*> -> list('[', ']', value, depth) { write(it, depth + 1) }
            is String -> string(value)
            is Double -> out.append(number(value))
            is Float -> out.append(number(value.toDouble()))
            null, is Boolean, is Long, is Int -> out.append(value)
            else -> throw IllegalArgumentException("no JSON for a ${value.javaClass.name}")
        }
    }

    private fun number(value: Double): String {
        require(value.isFinite()) { "JSON has no $value" }
        return value.toString()
    }

    private fun <T> list(
        open: Char,
        close: Char,
        values: Collection<T>,
        depth: Int,
        each: (T) -> Unit,
    ) {
        out.append(open)
        var first = true
        for (value in values) {
            if (!first) out.append(if (indent > 0) "," else ", ")
            first = false
            line(depth + 1)
            each(value)
        }
        if (values.isNotEmpty()) line(depth)
        out.append(close)
    }

    private fun line(depth: Int) {
        if (indent > 0) out.append('\n').append(" ".repeat(indent * depth))
    }

    private fun string(value: String) {
        out.append('"')
        for (char in value) {
            when {
                char == '"' || char == '\\' -> out.append('\\').append(char)
                char < ' ' || char == '\u2028' || char == '\u2029' ->
                    out.append("\\u").append(char.code.toString(16).padStart(4, '0'))
                else -> out.append(char)
            }
        }
        out.append('"')
    }
}
