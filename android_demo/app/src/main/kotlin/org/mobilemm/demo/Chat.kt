package org.mobilemm.demo

import android.app.ActivityManager
import android.content.Context
import android.os.Handler
import android.os.Looper
import org.mobilemm.Backend
import org.mobilemm.Bundle
import org.mobilemm.Drawing
import org.mobilemm.Drawn
import org.mobilemm.Json
import org.mobilemm.JsonError
import org.mobilemm.MobileMMError
import org.mobilemm.PixelRaster
import org.mobilemm.Said
import org.mobilemm.Sampling
import org.mobilemm.SelfCheck
import org.mobilemm.Session
import org.mobilemm.Sketch
import org.mobilemm.Stats
import java.io.File
import java.io.IOException
import java.util.UUID
import java.util.concurrent.Executors

/**
 * A picture that the model has drawn: a file of the conversation's folder.
 *
 * @property at where in the answer's text it stands.
 * @property asked what was said to get it, for those who do not see it.
 * @property signal what the model said at this place.
 */
data class ChatDrawing(val file: String, val at: Int, val seed: String, val asked: String, val signal: String)

/** One thing said, as it is shown and kept: `pictures` are files of the conversation's folder. */
data class ChatMessage(
    val role: String,
    val text: String,
    val pictures: List<String> = emptyList(),
    val drawings: List<ChatDrawing> = emptyList(),
) {
    val isEmpty get() = text.isEmpty() && drawings.isEmpty()

    /** What the model knows of it. */
    val memory get() = drawings.foldRight(text) { drawing, text -> StringBuilder(text).insert(drawing.at, drawing.signal).toString() }

    /** What is shown one below the other: words, and each picture by itself. */
    val lines: List<ChatMessage>
        get() {
            if (drawings.isEmpty()) return listOf(this)
            val found = ArrayList<ChatMessage>()
            var from = 0
            for (drawing in drawings) {
                if (drawing.at > from) found += ChatMessage(role, text.substring(from, drawing.at))
                found += ChatMessage(role, "", drawings = listOf(drawing))
                from = drawing.at
            }
            if (from < text.length) found += ChatMessage(role, text.substring(from))
            return found
        }
}

/** What the conversation does at the moment, for the line below it. */
sealed interface Phase {
    object Idle : Phase

    /** Something that takes a while; the text is a string resource. Of a drawing on its way, what there is of it. */
    data class Busy(val text: Int, val sketch: PixelRaster? = null) : Phase

    data class Answering(val tokens: Int, val rate: Double) : Phase

    data class Answered(val stats: Stats, val stopped: Boolean) : Phase

    data class Failed(val message: String) : Phase
}

/**
 * The one conversation of the app, which outlives its screens: it goes on while one is rotated, and is kept on disk
 * for when the system ends the process.
 *
 * All that the model does happens on one thread of its own; listeners hear of it on the main one.
 */
class Chat(private val context: Context, private val models: Models) {
    private val worker = Executors.newSingleThreadExecutor { Thread(it, "model") }
    private val main = Handler(Looper.getMainLooper())
    private val listeners = LinkedHashSet<() -> Unit>()
    private val folder = File(context.filesDir, "conversation")
    private val file = File(folder, "conversation.json")

    /** All that was said; the last answer grows while it is given. Of the main thread. */
    var messages: List<ChatMessage> = emptyList()
        private set

    /** Pictures that go with the next question. */
    var pending: List<String> = emptyList()
        private set

    var phase: Phase = Phase.Idle
        private set(value) {
            field = value
            listeners.toList().forEach { it() }
        }

    val isBusy get() = phase is Phase.Busy || phase is Phase.Answering

    // Of the worker's thread.
    private var backend: Backend? = null
    private var session: Session? = null
    @Volatile private var openName: String? = null

    @Volatile private var running: Backend? = null

    @Volatile private var stopping = false

    init {
        folder.mkdirs()
        restore()
    }

    fun listen(listener: () -> Unit) = listeners.add(listener)

    fun unlisten(listener: () -> Unit) = listeners.remove(listener)

    fun pictureFile(name: String) = File(folder, name)

    /** A place for a picture that is about to come. */
    fun newPictureFile() = File(folder, "${UUID.randomUUID()}$PICTURE")

    /** A picture that lies in [newPictureFile] goes with the next question. */
    fun show(picture: File) {
        pending = pending + picture.name
        changed()
    }

    fun takeBack(picture: String) {
        pending = pending - picture
        pictureFile(picture).delete()
        changed()
    }

    /** Opens the model, unpacks it and checks it first where that was not done yet. */
    fun start() {
        if (isBusy || (openName != null && openName == models.chosen)) return
        phase = Phase.Busy(R.string.loading)
        inBackground { open() }
    }

    /** Asks with the pending pictures; the answer comes in [messages]. */
    fun ask(text: String) {
        if (isBusy) return
        val question = ChatMessage("user", text, pending)
        val before = messages
        val waiting = pending
        messages = before + question + ChatMessage("assistant", "")
        pending = emptyList()
        stopping = false
        phase = Phase.Busy(R.string.loading)
        inBackground(failed = {
            messages = before
            pending = waiting
        }) {
            open()
            answer(question, before)
        }
    }

    /** Stops the answer at once; what was said by then stays. */
    fun stop() {
        stopping = true
        running?.cancel()
    }

    /** Forgets all that was said and shown. */
    fun clear() {
        stop()
        messages = emptyList()
        pending = emptyList()
        changed()
        inBackground {
            session?.reset()
            val kept = (messages.flatMap { message -> message.pictures + message.drawings.map { it.file } } + pending).toSet()
            val pictures = folder.listFiles()?.filter { it.name.endsWith(PICTURE) || it.name.endsWith(DRAWING) }
            pictures?.filter { it.name !in kept }?.forEach { it.delete() }
            idle()
        }
    }

    /** Gives the model's memory back, unless it is just answering; the next question loads it again. */
    fun release() {
        worker.execute { close() }
    }

    /** Runs something else with this thread and no model in memory: an import, a benchmark. */
    fun alone(action: () -> Unit) {
        worker.execute {
            close()
            action()
        }
    }

    /** Checks the model anew; `report` hears each line on the main thread. */
    fun check(
        report: (passed: Boolean, line: String) -> Unit,
        done: (passed: Boolean?) -> Unit,
    ) {
        if (isBusy) return
        phase = Phase.Busy(R.string.checking)
        inBackground(failed = { done(null) }) {
            close()
            val bundle = Bundle.open(models.library.folder(chosen()))
            val passed = checked(bundle, report)
            post { done(passed) }
            idle()
        }
    }

    private fun chosen() = models.chosen ?: throw MobileMMError(context.getString(R.string.no_model))

    private fun open() {
        if (models.hasPacked()) {
            post { phase = Phase.Busy(R.string.unpacking) }
            models.unpack()
            post { phase = Phase.Busy(R.string.loading) }
        }
        val name = chosen()
        if (session != null && openName == name) return idle()
        close()
        val bundle = Bundle.open(models.library.folder(name))
        if (!models.isChecked(bundle)) {
            post { phase = Phase.Busy(R.string.checking) }
            val lines = ArrayList<String>()
            if (!checked(bundle) { passed, line -> if (!passed) lines += line }) {
                throw MobileMMError("${context.getString(R.string.check_failed)} ${lines.firstOrNull() ?: ""}")
            }
        }
        val opened = Backend.open(bundle)
        backend = opened
        session = Session(bundle, opened, Sampling(maxNewTokens = LONGEST_ANSWER), keepVision = hasRoom(bundle), sketches = true).also { it.warm() }
        openName = name
        idle()
    }

    private fun checked(
        bundle: Bundle,
        report: (Boolean, String) -> Unit,
    ): Boolean {
        Backend.open(bundle).use { backend ->
            val checks =
                SelfCheck(bundle, backend) { Pictures.decode(it) }.run { check ->
                    post { report(check.passed, "${check.part}: ${check.text}") }
                }
            val passed = checks.all { it.passed }
            if (passed) models.keepChecked(bundle)
            return passed
        }
    }

    /** Whether all parts may stay in memory: they and as much again must be free. */
    private fun hasRoom(bundle: Bundle): Boolean {
        val memory = ActivityManager.MemoryInfo()
        (context.getSystemService(Context.ACTIVITY_SERVICE) as ActivityManager).getMemoryInfo(memory)
        return memory.availMem > 2 * bundle.manifest.parts.values.sumOf { it.peakMemory }
    }

    private fun answer(
        question: ChatMessage,
        before: List<ChatMessage>,
    ) {
        val session = session!!
        // After another model, a restart or a failure, the session does not know what was said.
        val known = session.messages.filter { it.role != "system" }.map { it.role to it.text }
        if (known != before.map { it.role to it.memory } || session.pending.isNotEmpty()) {
            session.reset()
            val said = before.map { message -> message to message.pictures.map { Pictures.decode(pictureFile(it)) } }
            session.restore(
                said.map { (message, rasters) -> Said(message.role, message.memory, rasters.map(session::picture)) },
            )
        }
        for (picture in question.pictures) session.lookAt(Pictures.decode(pictureFile(picture)))
        post { phase = Phase.Busy(R.string.reading) }
        var answer = ChatMessage("assistant", "")
        running = backend
        try {
            if (stopping) throw MobileMMError(context.getString(R.string.stopped))
            session.stream(question.text) { piece ->
                // A stop that came before the session had begun.
                if (stopping) running?.cancel()
                if (piece is Drawing || piece is Sketch) {
                    post { phase = Phase.Busy(R.string.drawing, (piece as? Sketch)?.picture) }
                    return@stream
                }
                answer = answer.copy(text = answer.text + piece.text)
                if (piece is Drawn) answer = answer.copy(drawings = answer.drawings + kept(piece, answer.text.length, question.text))
                val soFar = answer
                val stats = session.stats!!
                val tokens = stats.newTokens
                val rate = stats.decodeRate
                post {
                    messages = messages.dropLast(1) + soFar
                    phase = Phase.Answering(tokens, rate)
                }
            }
        } finally {
            running = null
        }
        val stats = session.stats!!
        val nothing = answer.isEmpty && stopping
        post {
            if (nothing) {
                messages = before
                pending = question.pictures
            }
            keep()
            phase = Phase.Answered(stats, stopping)
        }
    }

    private fun kept(
        drawn: Drawn,
        at: Int,
        asked: String,
    ): ChatDrawing {
        val file = File(folder, "${UUID.randomUUID()}$DRAWING")
        try {
            Pictures.write(drawn.picture, file)
        } catch (error: IOException) {
            file.delete()
            throw MobileMMError("the drawing cannot be kept: is there free space?", error)
        }
        return ChatDrawing(file.name, at, drawn.seed.toString(), asked, drawn.signal)
    }

    private fun close() {
        session?.close()
        backend?.close()
        session = null
        backend = null
        openName = null
    }

    private fun inBackground(
        failed: () -> Unit = {},
        action: () -> Unit,
    ) {
        worker.execute {
            try {
                action()
            } catch (error: MobileMMError) {
                post {
                    failed()
                    phase = Phase.Failed(error.message ?: "")
                }
            } catch (error: OutOfMemoryError) {
                close()
                post {
                    failed()
                    phase = Phase.Failed("there is not enough memory on this device for this model")
                }
            }
        }
    }

    private fun idle() = post { if (phase is Phase.Busy) phase = Phase.Idle }

    private fun post(action: () -> Unit) {
        main.post(action)
    }

    private fun changed() {
        keep()
        listeners.toList().forEach { it() }
    }

    /** Writes the conversation, whole or not at all; also called by screens that are about to be gone. */
    fun keep() {
        fun of(drawing: ChatDrawing) =
            mapOf(
                "file" to drawing.file,
                "at" to drawing.at,
                "seed" to drawing.seed,
                "asked" to drawing.asked,
                "signal" to drawing.signal,
            )

        fun of(message: ChatMessage) =
            mapOf(
                "role" to message.role,
                "text" to message.text,
                "pictures" to message.pictures,
                "drawings" to message.drawings.map(::of),
            )
        // An answer that is just being given counts as far as it is; an empty one does not.
        val isWaiting = messages.lastOrNull()?.isEmpty == true
        val said = if (isWaiting) messages.dropLast(2) else messages
        val asked = if (isWaiting) messages[messages.size - 2].pictures else emptyList()
        val draft = File(folder, "conversation.json.part")
        try {
            draft.writeText(Json.write(mapOf("messages" to said.map(::of), "pending" to (pending + asked))))
            draft.renameTo(file)
        } catch (_: IOException) {
            draft.delete()
        }
    }

    private fun restore() {
        try {
            val kept = Json.parse(file.readBytes()) as? Map<*, *> ?: return
            messages =
                (kept["messages"] as List<*>).map { value ->
                    val message = value as Map<*, *>
                    val text = message["text"] as String
                    ChatMessage(message["role"] as String, text, there(message["pictures"]), drawn(message["drawings"], text))
                }
            pending = there(kept["pending"])
        } catch (_: IOException) {
        } catch (_: JsonError) {
        } catch (_: ClassCastException) {
        }
    }

    private fun there(names: Any?) = (names as List<*>).map { it as String }.filter { pictureFile(it).isFile }

    /** Earlier versions of the app kept none. */
    private fun drawn(
        kept: Any?,
        text: String,
    ) = (kept as List<*>?).orEmpty().map { value ->
        val drawing = value as Map<*, *>
        ChatDrawing(
            drawing["file"] as String,
            (drawing["at"] as Long).toInt().coerceIn(0, text.length),
            drawing["seed"] as String,
            drawing["asked"] as String,
            drawing["signal"] as String,
        )
    }.filter { pictureFile(it.file).isFile }

    companion object {
        /** How names end: of pictures that are shown, of those that are drawn. */
        const val PICTURE = ".picture"
        const val DRAWING = ".png"
        private const val LONGEST_ANSWER = 512
    }
}
