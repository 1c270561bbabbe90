package org.mobilemm.demo

import android.os.Handler
import android.os.Looper
import org.mobilemm.Bundle
import org.mobilemm.MobileMMError
import java.util.concurrent.Executors

/** The import that is under way, which goes on while screens come and go. */
class Imports(private val models: Models, private val chat: Chat) {
    sealed interface State {
        object Idle : State

        /** `total` 0 where it is not known. */
        data class Running(val done: Long, val total: Long) : State

        data class Done(val name: String) : State

        data class Failed(val message: String) : State
    }

    private val worker = Executors.newSingleThreadExecutor { Thread(it, "import") }
    private val main = Handler(Looper.getMainLooper())
    private val listeners = LinkedHashSet<() -> Unit>()

    @Volatile private var cancelled = false

    /** Of the main thread. */
    var state: State = State.Idle
        private set(value) {
            field = value
            listeners.toList().forEach { it() }
        }

    fun listen(listener: () -> Unit) = listeners.add(listener)

    fun unlisten(listener: () -> Unit) = listeners.remove(listener)

    fun cancel() {
        cancelled = true
    }

    /** Runs an import; what it raises becomes [State.Failed]. The new bundle is the one in use afterwards. */
    fun start(action: (progress: (Long, Long) -> Unit, cancelled: () -> Boolean) -> Bundle) {
        if (state is State.Running) return
        cancelled = false
        state = State.Running(0, 0)
        var told = 0L
        worker.execute {
            try {
                val bundle =
                    action(
                        { done, total ->
                            // A few times a second: each needs the main thread.
                            val now = System.nanoTime()
                            if (now - told > TELL_EACH) {
                                told = now
                                main.post { if (state is State.Running) state = State.Running(done, total) }
                            }
                        },
                        { cancelled },
                    )
                models.chosen = bundle.folder.name
                // One of the same name may have been open.
                chat.release()
                main.post { state = State.Done(bundle.folder.name) }
            } catch (error: MobileMMError) {
                main.post { state = State.Failed(error.message ?: "") }
            }
        }
    }

    /** Deletes a bundle once no conversation holds it open. */
    fun delete(name: String) {
        chat.alone {
            try {
                models.library.delete(name)
                main.post { state = State.Idle }
            } catch (error: MobileMMError) {
                main.post { state = State.Failed(error.message ?: "") }
            }
        }
    }

    private companion object {
        const val TELL_EACH = 200_000_000L
    }
}
