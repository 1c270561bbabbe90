package org.mobilemm

/** A picture as the vision part takes it: uint8 (3, height, width), and the hash of these pixels. */
class Picture(val pixels: ByteArray, val key: String)

/** What was said, with the pictures that were shown; of one that was drawn, the text has the signal tokens. */
class Said(val role: String, val text: String, val pictures: List<Picture> = emptyList())

/**
 * What every conversation does: its turns, also those that break off.
 *
 * One thread talks at a time; [cancel] may come from any.
 *
 * @param system a system prompt, where the model's template takes one.
 */
abstract class Conversation(val sampling: Sampling, val system: String?) {
    private val said = ArrayList<Said>()
    private val waiting = ArrayList<Picture>()

    /** What was said so far, the system prompt first. */
    val messages: List<Said> get() = said

    /** Pictures that go with what is said next. */
    val pending: List<Picture> get() = waiting

    init {
        forget()
    }

    /** Forgets all that was said and shown. */
    open fun reset() = forget()

    private fun forget() {
        waiting.clear()
        said.clear()
        if (system != null) said += Said("system", system)
    }

    /** Takes up a conversation that was kept: what comes behind the system prompt. */
    fun restore(messages: List<Said>) {
        forget()
        said += messages
    }

    /** Shows a picture; it goes with what is said next. Raises [MobileMMError] when there is nothing that takes one. */
    fun lookAt(picture: Raster) {
        waiting += prepare(picture)
    }

    /** The answer to `text` in one piece. */
    fun reply(text: String) = stream(text) {}

    /**
     * The answer to `text`; `onPiece` gets it as it comes, in pieces whose texts join to the answer. A picture that the
     * model draws is a piece of its own, a [Drawn]; that one is begun is told by [Drawing], and
     * what there is of it by each [Sketch].
     *
     * An answer that is stopped by [cancel] ends where it is; what was said by then is remembered, or, when nothing
     * was, the turn is forgotten. Raises [MobileMMError] when the conversation no longer fits into the model's
     * context, its template refuses it, or a part fails: then the conversation is what it was before, with the
     * pictures still waiting.
     */
    fun stream(
        text: String,
        onPiece: (Piece) -> Unit,
    ): String {
        val turn = Said("user", text, waiting.toList())
        val answer = StringBuilder()
        val memory = StringBuilder()
        try {
            answer(said + turn) { piece ->
                answer.append(piece.text)
                memory.append(if (piece is Drawn) piece.signal else piece.text)
                onPiece(piece)
            }
        } catch (_: Cancelled) {
            if (memory.isEmpty()) return ""
        }
        waiting.clear()
        said += turn
        said += Said("assistant", memory.toString())
        return answer.toString()
    }

    /** Stops the answer that is being given, at once, from any thread. */
    abstract fun cancel()

    protected abstract fun prepare(picture: Raster): Picture

    /** The answer to the last of these messages, piece by piece. Raises [Cancelled] when it is stopped. */
    protected abstract fun answer(
        messages: List<Said>,
        onPiece: (Piece) -> Unit,
    )
}
