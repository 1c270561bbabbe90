package org.mobilemm

import java.io.File
import java.io.IOException

/**
 * A `tokenizer.json` of Hugging Face's tokenizers, models of the BPE kind: the same ids and the same text.
 *
 * Normalizers, pre-tokenizers, decoders and post-processors are those that byte-level (GPT-2, LLaMA 3, Qwen, SmolLM)
 * and SentencePiece models (LLaMA, Gemma) use. What is unknown is refused when the file is read: it never gives other
 * ids in silence. Source: the library's documentation of its components.
 */
class Tokenizer private constructor(private val json: Map<String, Any?>, private val leftOut: Int?) {
    private val model = BytePairEncoding.read(json.at("model"))
    private val added = AddedTokens.read(json["added_tokens"] as? List<*> ?: emptyList<Any?>(), leftOut)
    private val normalize = normalizer(json["normalizer"])
    private val preTokenize = preTokenizer(json["pre_tokenizer"])
    private val decoders = decoders(json["decoder"])
    private val framing = framing(json["post_processor"])
    private val tokens: Map<Int, String> = model.tokens + added.contents

    /** One more than the largest id: models often have a few rows more, which stand for nothing. */
    val size = 1 + (tokens.keys.maxOrNull() ?: -1)

    /** The ids of a text, `special` with the tokens that the tokenizer puts around it. */
    fun encode(
        text: String,
        special: Boolean = false,
    ): List<Int> {
        val ids = ArrayList<Int>()
        if (special) ids += framing.first
        var start = 0
        for (piece in added.split(text, normalized = false)) {
            if (piece.id != null) {
                ids += piece.id
            } else {
                // A normalizer may put something in front; what begins the text is told from what follows a token.
                for (inner in added.split(normalize(piece.text), normalized = true)) {
                    if (inner.id != null) {
                        ids += inner.id
                    } else {
                        for (word in preTokenize(inner.text, start == 0 && inner.first)) model.encode(word, ids)
                    }
                }
            }
            start += piece.text.length
        }
        if (special) ids += framing.second
        return ids
    }

    /** The text of ids, `special` tokens left out or not; ids that stand for nothing always are. */
    fun decode(
        ids: List<Int>,
        special: Boolean = false,
    ): String {
        var words = ids.mapNotNull { id -> tokens[id]?.takeUnless { !special && it in added.special } }
        if (decoders.isEmpty()) return words.joinToString(" ")
        for (decode in decoders) words = decode(words)
        return words.joinToString("")
    }

    /** The same tokenizer without one of its added tokens, which is then text as any other. */
    fun without(id: Int) = Tokenizer(json, id)

    companion object {
        private const val MOST_BYTES = 256L shl 20

        /** Raises [MobileMMError] naming the file for what is no tokenizer, or one that is not known here. */
        fun read(file: File): Tokenizer {
            if (file.length() > MOST_BYTES) throw MobileMMError("$file: too large for a tokenizer")
            try {
                @Suppress("UNCHECKED_CAST")
                val json =
                    Json.parse(file.readBytes()) as? Map<String, Any?> ?: throw UnknownTokenizer("it is no JSON object")
                return Tokenizer(json, null)
            } catch (error: IOException) {
                throw MobileMMError("$file: cannot be read (${oneLine(error)})", error)
            } catch (error: JsonError) {
                throw MobileMMError("$file: ${error.message}", error)
            } catch (error: UnknownTokenizer) {
                throw MobileMMError("$file: not a tokenizer that can be read (${error.message})", error)
            }
        }
    }
}

/** What of a tokenizer is not known here. */
internal class UnknownTokenizer(message: String) : Exception(message)

@Suppress("UNCHECKED_CAST")
internal fun Map<String, Any?>.at(key: String): Map<String, Any?> =
    this[key] as? Map<String, Any?> ?: throw UnknownTokenizer("'$key' is missing or no object")

@Suppress("UNCHECKED_CAST")
internal fun Map<String, Any?>.all(key: String): List<Map<String, Any?>> =
    (this[key] as? List<*> ?: throw UnknownTokenizer("'$key' is missing or no array")).map {
        it as? Map<String, Any?> ?: throw UnknownTokenizer("'$key' holds no object")
    }

internal fun Map<String, Any?>.text(key: String): String =
    this[key] as? String ?: throw UnknownTokenizer("'$key' is missing or no string")

internal fun Map<String, Any?>.flag(
    key: String,
    default: Boolean = false,
): Boolean = this[key] as? Boolean ?: default

@Suppress("UNCHECKED_CAST")
internal fun component(value: Any?): Map<String, Any?>? = value as? Map<String, Any?>

internal fun unknown(
    kind: String,
    of: Map<String, Any?>,
): Nothing = throw UnknownTokenizer("the $kind ${shown(of["type"])} is not known here")

/** Ids that `encode(…, special = true)` puts before and behind a text. */
private fun framing(value: Any?): Pair<List<Int>, List<Int>> {
    val nothing = emptyList<Int>() to emptyList<Int>()
    val of = component(value) ?: return nothing
    return when (of["type"]) {
        "ByteLevel" -> nothing
        "Sequence" ->
            of.all("processors").map(::framing).fold(nothing) { outer, inner ->
                (inner.first + outer.first) to (outer.second + inner.second)
            }
        "TemplateProcessing" -> {
            val special = of.at("special_tokens")
            val before = ArrayList<Int>()
            val behind = ArrayList<Int>()
            var into = before
            for (piece in of.all("single")) {
                if (piece.containsKey("Sequence")) {
                    into = behind
                } else {
                    val ids = special.at(piece.at("SpecialToken").text("id"))["ids"] as? List<*>
                    into += (ids ?: throw UnknownTokenizer("a special token without 'ids'")).map { (it as Long).toInt() }
                }
            }
            before to behind
        }
        else -> unknown("post-processor", of)
    }
}
