package org.mobilemm.demo

import android.annotation.TargetApi
import android.app.Activity
import android.app.AlertDialog
import android.content.ActivityNotFoundException
import android.content.Intent
import android.graphics.Bitmap
import android.net.Uri
import android.os.Build
import android.os.Bundle
import android.provider.MediaStore
import android.view.Gravity
import android.view.Menu
import android.view.MenuItem
import android.view.View
import android.view.accessibility.AccessibilityNodeInfo
import android.view.inputmethod.EditorInfo
import android.widget.EditText
import android.widget.ImageButton
import android.widget.ImageView
import android.widget.LinearLayout
import android.widget.ScrollView
import android.widget.TextView
import android.widget.Toast
import org.mobilemm.PixelRaster
import java.io.File
import java.io.IOException

/** The conversation: pictures, questions, answers as they come. */
open class ChatActivity : Activity() {
    private val app get() = application as DemoApplication
    private val chat get() = app.chat
    private val listener = { show() }
    private var photo: File? = null

    override fun onCreate(savedInstanceState: Bundle?) {
        super.onCreate(savedInstanceState)
        setContentView(R.layout.chat)
        photo = savedInstanceState?.getString(PHOTO)?.let(::File)
        findViewById<ImageButton>(R.id.camera).setOnClickListener { takePicture() }
        findViewById<ImageButton>(R.id.picture).setOnClickListener { pickPicture() }
        findViewById<ImageButton>(R.id.send).setOnClickListener { if (chat.isBusy) chat.stop() else ask() }
        question.setOnEditorActionListener { _, action, _ ->
            if (action == EditorInfo.IME_ACTION_SEND) ask()
            action == EditorInfo.IME_ACTION_SEND
        }
    }

    override fun onStart() {
        super.onStart()
        chat.listen(listener)
        show()
        chat.start()
    }

    override fun onStop() {
        chat.unlisten(listener)
        chat.keep()
        super.onStop()
    }

    override fun onSaveInstanceState(outState: Bundle) {
        super.onSaveInstanceState(outState)
        photo?.let { outState.putString(PHOTO, it.path) }
    }

    override fun onCreateOptionsMenu(menu: Menu): Boolean {
        menuInflater.inflate(R.menu.chat, menu)
        return true
    }

    override fun onOptionsItemSelected(item: MenuItem): Boolean {
        when (item.itemId) {
            R.id.new_conversation -> chat.clear()
            R.id.models -> startActivity(Intent(this, ModelsActivity::class.java))
            R.id.check -> startActivity(Intent(this, CheckActivity::class.java))
            R.id.benchmark -> startActivity(Intent(this, BenchmarkActivity::class.java))
            else -> return super.onOptionsItemSelected(item)
        }
        return true
    }

    // --- asking --------------------------------------------------------------------------------------------

    private val question get() = findViewById<EditText>(R.id.question)

    private fun ask() {
        val text = question.text.toString().trim()
        if (chat.isBusy || (text.isEmpty() && chat.pending.isEmpty())) return
        question.setText("")
        chat.ask(text)
    }

    private fun takePicture() {
        val file = chat.newPictureFile()
        val uri = PictureProvider.offer(this, file)
        val intent =
            Intent(MediaStore.ACTION_IMAGE_CAPTURE)
                .putExtra(MediaStore.EXTRA_OUTPUT, uri)
                .addFlags(Intent.FLAG_GRANT_WRITE_URI_PERMISSION or Intent.FLAG_GRANT_READ_URI_PERMISSION)
        photo = file
        startForResult(intent, TAKE, R.string.no_camera)
    }

    private fun pickPicture() {
        val intent = Intent(Intent.ACTION_GET_CONTENT).setType("image/*").addCategory(Intent.CATEGORY_OPENABLE)
        startForResult(intent, PICK, R.string.no_picker)
    }

    private fun startForResult(
        intent: Intent,
        request: Int,
        missing: Int,
    ) {
        try {
            startActivityForResult(intent, request)
        } catch (_: ActivityNotFoundException) {
            Toast.makeText(this, missing, Toast.LENGTH_LONG).show()
        }
    }

    public override fun onActivityResult(
        requestCode: Int,
        resultCode: Int,
        data: Intent?,
    ) {
        if (requestCode == TAKE) {
            val file = photo
            photo = null
            if (resultCode == RESULT_OK && file != null && file.length() > 0) attach(file) else file?.delete()
        } else if (requestCode == PICK && resultCode == RESULT_OK) {
            data?.data?.let(::copy)
        }
    }

    /** The picture is copied, because the right to read it ends with this screen. */
    private fun copy(uri: Uri) {
        val file = chat.newPictureFile()
        try {
            val stream = contentResolver.openInputStream(uri) ?: throw IOException("nothing to read")
            stream.use { from -> file.outputStream().use { from.copyTo(it) } }
            attach(file)
        } catch (_: IOException) {
            unreadable(file)
        } catch (_: SecurityException) {
            unreadable(file)
        }
    }

    private fun attach(file: File) {
        if (Pictures.thumbnail(file, THUMBNAIL) == null) return unreadable(file)
        chat.show(file)
    }

    private fun unreadable(file: File) {
        file.delete()
        Toast.makeText(this, R.string.picture_failed, Toast.LENGTH_LONG).show()
    }

    // --- showing -------------------------------------------------------------------------------------------

    private fun show() {
        actionBar?.subtitle = app.models.chosen
        val list = findViewById<LinearLayout>(R.id.messages)
        val welcome = listOf(ChatMessage("", getString(R.string.welcome)))
        val shown = if (chat.messages.isEmpty()) welcome else chat.messages.flatMap { it.lines }
        for ((index, message) in shown.withIndex()) {
            val row = list.getChildAt(index)
            if (row?.tag == message) continue
            // An answer that grows keeps its view, so that a reader's place in it stays.
            val old = row?.tag as? ChatMessage
            if (old != null && old.role == message.role && old.pictures == message.pictures && old.drawings == message.drawings) {
                row.tag = message
                fill(row.findViewById(R.id.text), message)
            } else {
                while (list.childCount > index) list.removeViewAt(index)
                list.addView(row(message))
            }
        }
        while (list.childCount > shown.size) list.removeViewAt(shown.size)
        (chat.phase as? Phase.Busy)?.sketch?.let { list.addView(sketch(it)) }
        showPending()
        findViewById<TextView>(R.id.status).text = status(chat.phase)
        val send = findViewById<ImageButton>(R.id.send)
        send.setImageResource(if (chat.isBusy) R.drawable.stop else R.drawable.send)
        send.contentDescription = getString(if (chat.isBusy) R.string.stop else R.string.send)
        val scroll = findViewById<ScrollView>(R.id.scroll)
        scroll.post { scroll.scrollTo(0, list.bottom) }
    }

    private fun status(phase: Phase): String =
        when (phase) {
            Phase.Idle -> ""
            is Phase.Busy -> getString(phase.text)
            is Phase.Answering -> getString(R.string.answering, phase.rate)
            is Phase.Answered -> {
                val stats = phase.stats
                val figures =
                    if (stats.drawingSeconds > 0) {
                        getString(R.string.answered_drawing, stats.drawingSeconds, stats.ttft, stats.newTokens)
                    } else {
                        getString(R.string.answered, stats.decodeRate, stats.ttft, stats.newTokens)
                    }
                if (phase.stopped) "${getString(R.string.stopped)} · $figures" else figures
            }
            is Phase.Failed -> phase.message
        }

    private fun row(message: ChatMessage): View {
        val row = layoutInflater.inflate(R.layout.message, findViewById<LinearLayout>(R.id.messages), false) as LinearLayout
        row.tag = message
        row.gravity = if (message.role == "user") Gravity.END else Gravity.START
        val pictures = row.findViewById<LinearLayout>(R.id.pictures)
        for (name in message.pictures) pictures.addView(picture(name, PICTURE))
        for (drawing in message.drawings) pictures.addView(drawing(drawing))
        fill(row.findViewById(R.id.text), message)
        return row
    }

    private fun fill(
        view: TextView,
        message: ChatMessage,
    ) {
        view.text = message.text
        view.visibility = if (message.isEmpty) View.GONE else View.VISIBLE
        message.drawings.firstOrNull()?.let { return caption(view, it) }
        when (message.role) {
            "user" -> {
                view.setBackgroundResource(R.drawable.question)
                view.contentDescription = getString(R.string.you_said, message.text)
            }
            "assistant" -> {
                view.setBackgroundResource(R.drawable.answer)
                view.contentDescription = getString(R.string.model_said, message.text)
            }
            else -> view.background = null
        }
    }

    private fun caption(
        view: TextView,
        drawing: ChatDrawing,
    ) {
        view.text = getString(R.string.seed, drawing.seed)
        view.textSize = CAPTION
        view.setTextColor(getColor(R.color.soft_text))
        view.setPadding(0, 0, 0, 0)
    }

    /** A drawing on its way, in the place where it will stand. */
    private fun sketch(sketch: PixelRaster): ImageView {
        val view = picture(Pictures.bitmap(sketch), PICTURE)
        enlarge(view)
        view.contentDescription = getString(R.string.drawing)
        return view
    }

    /** A small drawing is shown as large as others. */
    private fun enlarge(view: ImageView) {
        view.layoutParams = LinearLayout.LayoutParams(view.maxWidth, view.maxWidth)
        view.scaleType = ImageView.ScaleType.FIT_START
    }

    private fun drawing(drawing: ChatDrawing): ImageView {
        val view = picture(drawing.file, PICTURE)
        enlarge(view)
        view.contentDescription = getString(R.string.drawn, drawing.asked, drawing.seed)
        view.setOnClickListener { offer(drawing) }
        val label = AccessibilityNodeInfo.AccessibilityAction(AccessibilityNodeInfo.ACTION_CLICK, getString(R.string.save_or_share))
        view.accessibilityDelegate =
            object : View.AccessibilityDelegate() {
                override fun onInitializeAccessibilityNodeInfo(
                    host: View,
                    info: AccessibilityNodeInfo,
                ) {
                    super.onInitializeAccessibilityNodeInfo(host, info)
                    info.addAction(label)
                }
            }
        return view
    }

    /** What can be done with a drawing. Into the gallery without a permission: since Android 10. */
    private fun offer(drawing: ChatDrawing) {
        val actions = ArrayList<Pair<Int, () -> Unit>>()
        if (Build.VERSION.SDK_INT >= Build.VERSION_CODES.Q) actions += R.string.save_picture to { save(drawing) }
        actions += R.string.share_picture to { share(drawing) }
        AlertDialog.Builder(this)
            .setTitle(getString(R.string.seed, drawing.seed))
            .setItems(actions.map { getString(it.first) }.toTypedArray()) { _, index -> actions[index].second() }
            .show()
    }

    @TargetApi(Build.VERSION_CODES.Q)
    private fun save(drawing: ChatDrawing) {
        val told =
            try {
                Pictures.addToGallery(contentResolver, chat.pictureFile(drawing.file), "mobilemm-${drawing.seed}.png")
                R.string.saved
            } catch (_: IOException) {
                R.string.save_failed
            }
        Toast.makeText(this, told, Toast.LENGTH_LONG).show()
    }

    private fun share(drawing: ChatDrawing) {
        val uri = PictureProvider.offer(this, chat.pictureFile(drawing.file))
        val intent = Intent(Intent.ACTION_SEND).setType("image/png").putExtra(Intent.EXTRA_STREAM, uri)
        startActivity(Intent.createChooser(intent.addFlags(Intent.FLAG_GRANT_READ_URI_PERMISSION), null))
    }

    private fun picture(
        name: String,
        side: Int,
    ) = picture(Pictures.thumbnail(chat.pictureFile(name), pixels(side)), side)

    private fun pixels(side: Int) = (side * resources.displayMetrics.density).toInt()

    private fun picture(
        bitmap: Bitmap?,
        side: Int,
    ): ImageView {
        val pixels = pixels(side)
        val view = ImageView(this)
        view.setImageBitmap(bitmap)
        view.contentDescription = getString(R.string.your_picture)
        view.adjustViewBounds = true
        view.maxWidth = pixels
        view.maxHeight = pixels
        view.setPadding(0, 0, 8, 8)
        return view
    }

    private fun showPending() {
        val row = findViewById<LinearLayout>(R.id.pending)
        findViewById<View>(R.id.pending_scroll).visibility = if (chat.pending.isEmpty()) View.GONE else View.VISIBLE
        if (row.tag == chat.pending) return
        row.tag = chat.pending
        row.removeAllViews()
        for (name in chat.pending) {
            val view = picture(name, PENDING)
            view.contentDescription = getString(R.string.remove_picture)
            view.setOnClickListener { chat.takeBack(name) }
            row.addView(view)
        }
    }

    companion object {
        const val TAKE = 1
        const val PICK = 2
        private const val PHOTO = "photo"

        // In density-independent pixels.
        private const val THUMBNAIL = 64
        private const val PICTURE = 220
        private const val PENDING = 72
        private const val CAPTION = 13f
    }
}
